"""Converts the settings of a YAML file to command-line arguments. Checked in tests/programs/test_finetune.py."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from paligemma.errors import UsageError
from paligemma.files import expand, read_regular
from paligemma.programs.commandline import suggestion

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 1 << 16
MAX_NAME_LENGTH = 80  # maximum number of characters of a name in a message
ADVICE = "Write a line `name: value` for each setting."


def read_config(file: str, known: Collection[str]) -> list[str]:
    """The settings of a YAML file as arguments, "--name=value". Settings that are null are left out.

    The file must contain one mapping, from each name to a value or to a list of values. Values remain text, as in any argument.
    Aliases, tags and deeper nesting are refused before the file is composed into nodes. So parsing takes time proportional to the
    size of the file, which is limited.

    Args:
        known: the names of all settings.
    Raises: UsageError if the file has another form, or a name is unknown or given twice.
    """
    root, settings = read_mapping(file), {}
    for key, value in root.value if root else ():
        where = f"{file}:{key.start_mark.line + 1}"
        name = key.value[:MAX_NAME_LENGTH] if key.id == "scalar" else f"a {key.id}"
        if name not in known:
            raise UsageError(f"{where}: unknown setting {name}.{suggestion(name, list(known), '')} --help lists all.")
        if name in settings:
            raise UsageError(f"{where}: {name} is given twice. Remove one of the two.")
        if isinstance(value.value, list) and value.id == "mapping":
            raise UsageError(f"{where}: {name} is a mapping, but one value, or several with commas, is needed.")
        is_null = value.tag.endswith(":null")
        settings[name] = None if is_null else value.value if value.id == "scalar" else ",".join(x.value for x in value.value)
    return [f"--{name}={text}" for name, text in settings.items() if text is not None]


def read_mapping(file: str) -> "yaml.MappingNode | None":
    """The mapping in a YAML file, from texts to texts or lists of texts; None if the file is empty. Raises: UsageError."""
    import yaml

    depth = 0
    try:
        text = read_regular(expand(file), MAX_BYTES, UsageError, "Name a YAML file of settings.").decode("utf-8-sig")
        for event in yaml.parse(text, yaml.SafeLoader):
            where = f"{file}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"
            if getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None:
                raise UsageError(f"{where}: aliases (& and *) and tags (!) are not allowed. {ADVICE}")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 2:
                raise UsageError(f"{where}: a value may be a list, but not a list of lists or mappings. {ADVICE}")
        root = yaml.compose(text, yaml.SafeLoader)
    except (ValueError, RecursionError, OverflowError, yaml.YAMLError) as error:
        # ValueError: the text is not UTF-8. OverflowError: the text has an escape such as \UFFFFFFFF.
        mark = getattr(error, "problem_mark", None)
        position = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UsageError(f"{file}{position} is not YAML. {ADVICE}") from error
    if isinstance(root, yaml.ScalarNode) and root.tag.endswith(":null"):  # the file contains only "---"
        return None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{file} contains a {'list' if isinstance(root, yaml.SequenceNode) else 'text'}. {ADVICE}")
    return root
