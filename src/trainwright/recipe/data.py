"""What it is trained on: the `data` key of a recipe. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainwright.recipe.strict import Section

DataFormat = Literal[
    "auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text", "indexed",
]  # fmt: skip

# What the data doctor refuses; `data.accept` names what to go on with all the same.
Finding = Literal[
    "double_bos", "missing_eos", "template", "replaced_characters", "truncated_answers",
]  # fmt: skip

MOST_TIMES = 100_000  # between the weights of two sources


class SourceRecipe(Section):
    """One source of samples."""

    path: str = Field(
        description="file, folder, glob, `shipped:arithmetic?rows=500`, `made:tokens?rows=64&length=512&vocab=32000`, "
        "or a hub id: hf:owner/name[@revision][:glob]"
    )
    format: DataFormat = Field("auto", description="auto looks at the first rows; indexed is Megatron's .bin/.idx")
    split: str | None = Field(None, description="split of a hub data set or a `datasets` folder")
    columns: dict[str, str] = Field(default_factory=dict, description="our key: the file's key, for odd names")
    document: Literal["line", "paragraph", "file"] = Field(
        "line", description="what one document is in a .txt file; paragraphs end at blank lines"
    )
    weight: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="share of rows when several sources are mixed without end"
    )
    epochs: float = Field(
        1.0, gt=0, le=1e6, description="passes over this source in one epoch of the mix, without weights"
    )


class FilterRecipe(Section):
    """Which samples stay."""

    min_characters: int = Field(0, ge=0, description="instruction + input + output must be longer than this")
    max_characters: int | None = Field(None, ge=1, description="... and not longer than this")
    min_tokens: int = Field(0, ge=0, description="fewest tokens of a sample")
    max_tokens: int | None = Field(None, ge=1, description="most tokens of a sample")
    deduplicate: bool = Field(False, description="drop samples whose text came before")


class DataRecipe(Section):
    """Sources, how a sample becomes tokens, and how tokens become rows of `seq_len`."""

    path: str | None = Field(None, description="shorthand for one source")
    format: DataFormat = Field("auto", description="format of `path`")
    sources: list[SourceRecipe] = Field(default_factory=list, description="several sources")
    validation: str | float = Field(0.0, description="held-out data: a path, or a fraction of the samples")
    seq_len: int = Field(2048, ge=8, description="tokens in a row")
    packing: bool = Field(True, description="several documents share a row without seeing each other; false: pad")
    template: str | None = Field(None, description="chat template by name; default: the model's own")
    system: str | None = Field(None, description="system message for samples that have none")
    document_mask: bool | None = Field(
        None, description="documents in a row do not see each other; default: yes for sft, no for pretrain"
    )
    loss_on: Literal["assistant", "all", "last"] = Field("assistant", description="which turns are trained")
    too_long: Literal["truncate", "drop", "split", "raise"] = Field(
        "truncate", description="a sample longer than seq_len"
    )
    max_truncated: float = Field(0.2, ge=0, le=1, description="refuse when more than this share of answers is cut")
    filter: FilterRecipe = Field(default_factory=FilterRecipe, description="which samples stay")
    accept: list[Finding] = Field(default_factory=list, description="findings of the doctor that do not stop the run")
    on_bad_row: Literal["stop", "skip"] = Field("stop", description="a row that cannot be read")
    max_line_bytes: int = Field(64 * 2**20, ge=1024, description="longest line that is read")
    streaming: bool = Field(False, description="tokenize while training, for data larger than the disk")
    shuffle: bool = Field(True, description="seeded by train.seed, the same for any number of ranks")
    workers: int | None = Field(None, ge=0, description="processes that tokenize; default: every core")
    cache: str | None = Field(None, description="where prepared tokens go; default: $TRAINWRIGHT_CACHE or ~/.cache")

    @model_validator(mode="after")
    def _one_way_to_name_sources(self) -> DataRecipe:
        if (self.path is None) == (not self.sources):
            raise ValueError("data needs exactly one of `path` and `sources`")
        if isinstance(self.validation, float) and not 0 <= self.validation < 1:
            raise ValueError(f"data.validation={self.validation} is no fraction: use 0 <= fraction < 1, or a path")
        weighted = [source for source in self.sources if source.weight is not None]
        if weighted and len(weighted) != len(self.sources):
            raise ValueError("data.sources: give every source a weight, or none")
        shares = [source.weight for source in weighted if source.weight is not None]
        if shares and max(shares) > MOST_TIMES * min(shares):
            raise ValueError(
                f"data.sources: weights from {min(shares):g} to {max(shares):g} are more than {MOST_TIMES:,} times "
                "apart: leave out what is next to never drawn"
            )
        if any(source.epochs != 1 for source in weighted):
            raise ValueError(
                "data.sources: a weight draws from its source without end, so epochs say nothing beside it: "
                "give one of them"
            )
        return self

    @property
    def all_sources(self) -> list[SourceRecipe]:
        """The sources, with the shorthand `path` written out."""
        return self.sources or [SourceRecipe(path=str(self.path), format=self.format)]
