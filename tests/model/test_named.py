"""Named models against their published parameter counts (Hugging Face model pages, papers), and how they are found."""

import json
import subprocess
import sys

import pytest

from trainwright.data.template import shipped_templates
from trainwright.errors import UserError
from trainwright.model.checkpoint import load_config
from trainwright.model.named import find, named_models, of_hub

PUBLISHED = {
    "facebook/llama-7b": 6_738_415_616,
    "facebook/llama-13b": 13_015_864_320,
    "facebook/llama-30b": 32_528_943_616,
    "facebook/llama-65b": 65_285_660_672,
    "meta-llama/Llama-2-7b": 6_738_415_616,
    "meta-llama/Llama-2-7b-chat": 6_738_415_616,
    "meta-llama/Llama-2-13b": 13_015_864_320,
    "meta-llama/Llama-2-13b-chat": 13_015_864_320,
    "meta-llama/Llama-2-70b": 68_976_648_192,
    "baichuan-inc/Baichuan-7B": 7_000_559_616,
    "baichuan-inc/Baichuan-13B-Base": 13_264_901_120,
    "baichuan-inc/Baichuan-13B-Chat": 13_264_901_120,
    "baichuan-inc/Baichuan2-7B-Base": 7_505_973_248,
    "baichuan-inc/Baichuan2-7B-Chat": 7_505_973_248,
    "baichuan-inc/Baichuan2-13B-Base": 13_896_668_160,
    "baichuan-inc/Baichuan2-13B-Chat": 13_896_668_160,
    "FlagAlpha/Llama2-Chinese-7b-Chat": 6_738_415_616,
    "FlagAlpha/Llama2-Chinese-13b-Chat": 13_015_864_320,
    "idea-ccnl/ziya-llama-13b-v1": 13_091_886_080,
    "linly-ai/chinese-llama-2-7b": 6_804_574_208,
    "linly-ai/chinese-llama-2-13b": 13_098_562_560,
    "THUDM/chatglm-6b-v1.1": 6_173_286_400,
    "THUDM/chatglm2-6b": 6_243_584_000,
    "bigscience/bloom-7b1": 7_069_016_064,
    "bigscience/bloomz-7b1": 7_069_016_064,
    "bigscience/bloomz-7b1-mt": 7_069_016_064,
    "qwen/qwen-7b": 7_721_324_544,
    "qwen/qwen-7b-chat": 7_721_324_544,
    "qwen/qwen-14b": 14_167_290_880,
    "qwen/qwen-14b-chat": 14_167_290_880,
    # the rest of the published list
    "THUDM/chatglm3-6b": 6_243_584_000,
    "THUDM/glm-130b": 128_697_794_560,
    "bigscience/bloom-560m": 559_214_592,
    "bigscience/bloom-1b1": 1_065_314_304,
    "bigscience/bloom-1b7": 1_722_408_960,
    "bigscience/bloom-3b": 3_002_557_440,
    "bigscience/bloom-176b": 176_247_271_424,
    "qwen/qwen-1_8b": 1_836_828_672,
    "qwen/qwen-72b": 72_287_920_128,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "openai/gpt2": 124_439_808,
    "openai/gpt2-medium": 354_823_168,
    "openai/gpt2-large": 774_030_080,
    "openai/gpt2-xl": 1_557_611_200,
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "facebook/opt-13b": 12_853_473_280,
    "facebook/opt-30b": 29_974_540_288,
}
# Published as a size in words only; the count is that of the paper's table: 12 L h^2 + 13 L h + (V + P) h + 2 h.
BY_FORMULA = {
    "openai/gpt3-small": (12, 768),
    "openai/gpt3-medium": (24, 1024),
    "openai/gpt3-large": (24, 1536),
    "openai/gpt3-1.3b": (24, 2048),
    "openai/gpt3-2.7b": (32, 2560),
    "openai/gpt3-6.7b": (32, 4096),
    "openai/gpt3-13b": (40, 5120),
    "openai/gpt3-175b": (96, 12288),
    "facebook/opt-66b": (64, 9216),
    "facebook/opt-175b": (96, 12288),
}


@pytest.mark.parametrize("model", named_models(), ids=lambda model: model.name)
def test_count(model) -> None:
    if model.name in BY_FORMULA:
        layers, width = BY_FORMULA[model.name]
        tables = 50272 + 2050 if "opt" in model.name else 50257 + 2048
        expected = 12 * layers * width**2 + 13 * layers * width + tables * width + 2 * width
    else:
        expected = PUBLISHED[model.name]
    assert model.parameters == expected


def test_every_published_name_is_there() -> None:
    names = [model.name for model in named_models()]
    assert sorted(names) == sorted(PUBLISHED.keys() | BY_FORMULA.keys())


def test_a_name_is_found_without_owner_or_capitals() -> None:
    assert find("qwen-7b") is find("QWEN/Qwen-7B")
    assert load_config("qwen-7b").num_parameters() == 7_721_324_544
    assert load_config("llama-2-7b", overrides={"num_hidden_layers": 2}).num_layers == 2


@pytest.mark.parametrize(
    ("spoken", "name"),
    [
        ("Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("llama-3-70b", "meta-llama/Meta-Llama-3-70B"),
        ("Mistral-7B", "mistralai/Mistral-7B-v0.1"),
        ("Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1"),
        ("BLOOM-176B", "bigscience/bloom-176b"),
        ("GLM-130B", "THUDM/glm-130b"),
    ],
)
def test_names_as_people_say_them(spoken: str, name: str) -> None:
    assert find(spoken) is find(name)


def test_the_models_verb_prints_them_all() -> None:
    """Name, family, count, context, licence, template of each, one line a model, and as JSON."""
    done = subprocess.run([sys.executable, "-m", "trainwright", "models"], capture_output=True, text=True, check=True)
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["name", "family", "parameters", "context", "licence", "template"]
    assert len(lines) == len(named_models())
    counts = PUBLISHED | {model.name: model.parameters for model in named_models() if model.name in BY_FORMULA}
    for model, line in zip(named_models(), lines, strict=True):
        row = f"{model.name} {model.family} {counts[model.name]:,} {model.context:,} {model.licence} {model.template}"
        assert line.split() == row.split()
    as_json = subprocess.run([sys.executable, "-m", "trainwright", "models", "--json"], capture_output=True, text=True)
    assert [row["parameters"] for row in json.loads(as_json.stdout)] == [counts[model.name] for model in named_models()]


def test_every_template_is_there() -> None:
    assert {model.template for model in named_models()} <= set(shipped_templates())


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"qwen2\.5-7b"):
        load_config("qwen25-7b")


def test_active_parameters_of_the_mixtures() -> None:
    """12.9 and 3.3 and 22.2 billion, as published."""
    active = {name: load_config(name).num_active_parameters() / 1e9 for name in ("mixtral-8x7b-v0.1", "qwen3-30b-a3b")}
    assert active["mixtral-8x7b-v0.1"] == pytest.approx(12.9, abs=0.05)
    assert active["qwen3-30b-a3b"] == pytest.approx(3.35, abs=0.05)
    assert load_config("qwen3-235b-a22b").num_active_parameters() / 1e9 == pytest.approx(22.2, abs=0.1)


def test_flops_of_llama_3_8b() -> None:
    """DESIGN's convention, against 45.0 + 6.4 GFLOP a token at length 8192, counted by others."""
    config = load_config("meta-llama-3-8b")
    assert config.flops_per_token(8192, "causal") / 1e9 == pytest.approx(51.47, abs=0.01)
    assert config.flops_per_token(8192) / 1e9 == pytest.approx(6 * 8.030261 + 12 * 32 * 4096 * 8192 / 1e9, abs=0.01)
    frozen = config.flops_per_token(8192, "causal", trained_parameters=0)
    assert config.flops_per_token(8192, "causal") - frozen == 2 * (config.num_parameters() - 128256 * 4096)


def test_no_torch_is_imported() -> None:
    """The planner reads these objects in two seconds on a laptop."""
    code = (
        "import sys; from trainwright.model.source import load_config; "
        "c = load_config('llama-2-7b'); c.flops_per_token(8); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hf:meta-llama/Llama-2-7b-chat-hf@main", "meta-llama/Llama-2-7b"),
        ("hf:meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("modelscope:LLM-Research/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("hf:meta-llama/Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("hf:mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("hf:qwen/qwen-7b-chat", "qwen/qwen-7b-chat"),
        ("hf:someone/their-own", None),
        ("qwen-7b", None),
    ],
)
def test_hub_ids_of_the_same_shape(path: str, name: str | None) -> None:
    found = of_hub(path)
    assert (found and found.name) == name
