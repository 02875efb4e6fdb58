"""What all builders of tokenlab's own data sets share."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds

Example = dict[str, Any]


class CorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder in which order is stable and nothing is repeated.

    Attributes:
        SUMMARY: one line that says what it holds.
        LICENCE: one line with the licences of the content.
        CITATION: where the content comes from.
        MEGABYTES: size of the prepared text as measured, for listings.
        FIELDS: the features of an example.
        UNIQUE: fields that no two examples share all of.
    """

    VERSION = tfds.core.Version("1.0.0")
    SUMMARY: str
    LICENCE: str
    CITATION: str
    MEGABYTES: float
    FIELDS: ClassVar[dict[str, tfds.features.FeatureConnector]]
    UNIQUE: tuple[str, ...] = ("text",)

    @abc.abstractmethod
    def examples(self) -> Iterator[Example]:
        """All examples in a stable order, repeats included."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.SUMMARY}\n\nLicence: {self.LICENCE}",
            features=tfds.features.FeaturesDict(self.FIELDS),
            citation=self.CITATION,
            license=self.LICENCE,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Example]]:
        return enumerate(without_repeats(self.examples(), self.UNIQUE))


def without_repeats(examples: Iterable[Example], fields: Sequence[str]) -> Iterator[Example]:
    """Drops each example that equals an earlier one in all of ``fields``."""
    seen = set()
    for example in examples:
        content = "\0".join(str(example[field]) for field in fields)
        digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield example
