"""The object is its own config: dotted overrides, typed parsing, JSON, fingerprints, help.

A *part* is a frozen dataclass or a Linen module (which is a dataclass). Everything here walks
the fields of parts; nothing here knows what any part does.
"""

from tokenlab.config.dumping import class_of, dump, fingerprint, load, tag
from tokenlab.config.help import FieldHelp, describe, field_doc
from tokenlab.config.overrides import replace
from tokenlab.config.parts import fields, is_part
from tokenlab.config.values import coerce, type_name
from tokenlab.core.errors import UserError

__all__ = [
    "FieldHelp",
    "UserError",
    "class_of",
    "coerce",
    "describe",
    "dump",
    "field_doc",
    "fields",
    "fingerprint",
    "is_part",
    "load",
    "replace",
    "tag",
    "type_name",
]
