"""Settings of how the next token is chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import GenerationConfig

from cogtune.configuration.answer_config import GenerateSection
from cogtune.configuration.model import CogVLM2Config
from cogtune.errors import ConfigError
from cogtune.language import tr

LIBRARY_TOP_K = 50
"""transformers' default ``top_k``, for a sampling checkpoint that names none (as the published one)."""


@dataclass(frozen=True)
class Decoding:
    """Greedy unless ``sample``. Then ``temperature``, ``top_p`` and ``top_k`` (0: off) apply."""

    max_new_tokens: int = 512
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        """Check the values. Raises ConfigError with the flag's name."""
        checks = {
            "--max-new-tokens": (self.max_new_tokens, self.max_new_tokens >= 1, tr("at least 1")),
            "--temperature": (
                self.temperature,
                self.temperature > 0,
                tr("above 0; for the likeliest token use --greedy"),
            ),
            "--top-p": (self.top_p, 0 < self.top_p <= 1, tr("above 0 and at most 1")),
            "--top-k": (self.top_k, self.top_k >= 0, tr("at least 0 (0: no limit)")),
        }
        for flag, (value, good, wanted) in checks.items():
            if not good:
                raise ConfigError(
                    tr("{flag} is {value}; it has to be {wanted}", flag=flag, value=value, wanted=wanted),
                    code="config-value",
                )

    @classmethod
    def from_section(
        cls, section: GenerateSection, *, max_new_tokens: int = 512, published: GenerationConfig | None = None
    ) -> Decoding:
        """Return the settings of the configuration's ``generate`` section.

        Args:
            max_new_tokens: used if the section names none.
            published: the checkpoint's own settings, for what the section leaves open; None: greedy.
        """
        tokens = section.max_new_tokens or max_new_tokens
        plain = cls(tokens) if published is None else cls.from_checkpoint(published, tokens)
        return plain.changed(
            greedy=section.greedy, temperature=section.temperature, top_p=section.top_p, top_k=section.top_k
        )

    @classmethod
    def from_checkpoint(cls, published: GenerationConfig, max_new_tokens: int) -> Decoding:
        """Return the checkpoint's own settings (published: sample at temperature 0.6 with top_p 0.9)."""
        if not published.do_sample:
            return cls(max_new_tokens)
        return cls(
            max_new_tokens,
            sample=True,
            temperature=1.0 if published.temperature is None else float(published.temperature),
            top_p=1.0 if published.top_p is None else float(published.top_p),
            top_k=LIBRARY_TOP_K if published.top_k is None else int(published.top_k),
        )

    def changed(
        self,
        *,
        greedy: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
    ) -> Decoding:
        """Return a copy with the user's values; a sampling option implies sampling.

        Raises:
            ConfigError: greedy together with a sampling option, or a value out of range.
        """
        typed = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        given = {name: value for name, value in typed.items() if value is not None}
        if greedy and given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(
                tr("--greedy takes the likeliest token, {flags} draw one", flags=flags), hint=tr("keep one of the two")
            )
        if greedy:
            return Decoding(self.max_new_tokens)
        return Decoding(**{**asdict(self), "sample": self.sample or bool(given), **given})

    def to_generation_config(self, config: CogVLM2Config, published: GenerationConfig) -> GenerationConfig:
        """Convert to transformers' GenerationConfig, with every end token of configuration and checkpoint."""
        ends = published.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        sampling: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.sample,
            bos_token_id=config.bos_token_id,
            eos_token_id=sorted({*config.eos_token_ids, *ends}),
            pad_token_id=config.pad_token_id,
            **(sampling if self.sample else {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values that decide the answer; without sampling, sampling options are left out."""
        values = asdict(self)
        return values if self.sample else {"max_new_tokens": self.max_new_tokens, "sample": False}
