"""The options of `ml.generate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

from minilora.common import unknown_name
from minilora.generation.sampling import Decoding

Stop = str | int | Sequence[str | int]


@dataclass(frozen=True)
class GenerationConfig:
    """The options of `ml.generate`; the names are those of transformers and OpenAI.

    The rules apply in this order: the penalties and the bias (generation/penalties.py),
    temperature, top_k, top_p, min_p.

    Attributes:
        max_new_tokens: longest answer in tokens.
        min_new_tokens: an answer of fewer tokens does not end at an end token.
        temperature: 0 is greedy.
        top_k: number of likeliest tokens to sample from; 0 is all.
        top_p: probability mass of the nucleus to sample from.
        min_p: smallest probability of a token to sample, as a part of the likeliest token's.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely.
        presence_penalty: subtracted from the logits of tokens that the answer has.
        frequency_penalty: subtracted from these logits for each occurrence.
        logit_bias: token id -> number that is added to its logit.
        stop: strings or token ids before which an answer ends. The model's own end tokens end it
            too.
        ignore_eos: True gives the model's own end tokens no effect.
        seed: seed of the sampling; None draws one.
        batch_size: prompts answered at a time; changes no answer, up to rounding.
        cuda_graph: on a GPU, start all the work of a token with one call. "auto" does so where the
            model allows it and it should pay; True raises where the model does not allow it.
            Changes no answer.
        schema: a JSON schema (a dict), a pydantic class, or "json" for any JSON object: each answer
            is then a JSON text that is valid for it (docs/structured.md). None is any text.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Stop | None = None
    ignore_eos: bool = False
    seed: int | None = None
    batch_size: int = 16
    cuda_graph: bool | str = "auto"
    schema: Any = None

    def __post_init__(self) -> None:
        if "" in self.stop_texts:
            raise ValueError(
                "stop contains an empty string, which every answer contains: remove it"
            )
        if self.min_new_tokens < 0:
            raise ValueError(f"min_new_tokens must be 0 or more, got {self.min_new_tokens!r}")
        self.rule(frozenset(), None)  # checks the other ranges
        if self.schema is None:
            return
        if self.stop or self.min_new_tokens or self.ignore_eos:
            raise ValueError(
                "schema: the end of the document is the end of the answer. Leave stop, "
                "min_new_tokens and ignore_eos out."
            )

    @property
    def stop_texts(self) -> list[str]:
        """The strings of `stop`."""
        return [entry for entry in self._stops() if isinstance(entry, str)]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The token ids of `stop`."""
        return frozenset(entry for entry in self._stops() if isinstance(entry, int))

    def _stops(self) -> list[str | int]:
        if isinstance(self.stop, str | int):
            return [self.stop]
        return [*(self.stop or ())]

    def rule(self, ends: frozenset[int], stopped: Any, grammar: Any = None) -> Decoding:
        """Return the rules that `generate_ids` takes.

        Args:
            ends: the model's own end tokens.
            stopped: a function that finds the stop strings in an answer, or None.
            grammar: the grammar of `schema` (structured.py), or None.
        """
        if self.ignore_eos:
            ends = frozenset()
        return Decoding(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            batch_size=self.batch_size,
            ends=ends | self.stop_ids,
            stopped=stopped,
            cuda_graph=self.cuda_graph,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            min_tokens=self.min_new_tokens,
            grammar=grammar,
        )


class GenerationFields(TypedDict, total=False):
    """The fields of `GenerationConfig`, for the keywords of `ml.generate`."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: Stop | None
    ignore_eos: bool
    seed: int | None
    batch_size: int
    cuda_graph: bool | str
    schema: Any


def with_fields(config: GenerationConfig | None, changes: GenerationFields) -> GenerationConfig:
    """Return a config in which some fields are replaced.

    Args:
        config: the config; None is the default.
        changes: the new values.

    Raises:
        ValueError: a field is unknown or out of range.
    """
    names = [entry.name for entry in fields(GenerationConfig)]
    for name in changes:
        if name not in names:
            raise unknown_name("generate", name, names)
    return replace(config or GenerationConfig(), **changes)
