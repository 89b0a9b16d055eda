"""Command lines: find the configs, check every override before anything runs, build objects from them.

A typing mistake costs a second here and a day on a cluster, so nothing starts before every key, type and choice has been looked at, in each job of a sweep.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import signal
import sys
import types
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import hydra
from beartype import BeartypeConf
from beartype.door import is_bearable
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from densecal.cli.settings import register_settings
from densecal.instantiation import accepted, instantiate, parameters
from densecal.labels import LabelSchema
from densecal.registry import MODELS, near_matches
from densecal.resources import configs_dir

__all__ = ["CommandError", "accepted", "build", "build_loss", "command", "composed", "given_settings", "prepare_arguments"]

_CARD_PATHS: list[str] = []
"""Cards of the user's own that this command line names by their files."""

_MOST_NAMES = 20
"""A longer list hides the hint before it."""

_INT_IS_FLOAT = BeartypeConf(is_pep484_tower=True)


class CommandError(ValueError):
    """What the user can mend, in one line; shown without a traceback."""


def command(config_name: str, run: Callable[[DictConfig], Any]) -> None:
    """Run a command's body under Hydra on the checked command line; errors of the user's are one line and exit status 1."""
    register_settings()
    try:
        sys.argv[1:] = prepare_arguments(sys.argv[1:], config_name)
    except CommandError as error:
        raise SystemExit(f"error: {error}") from None

    folder = get_args_parser().parse_known_args(sys.argv[1:])[0].config_dir
    options = ["--config-dir", folder] if folder else []

    def body(config: DictConfig) -> None:
        # A launcher that starts further processes repeats this job's command line, whichever job of a sweep it is, in the user's words.
        cards = {f"data={Path(card).stem}": f"data={card}" for card in _CARD_PATHS}
        sys.argv[1:] = [*options, *(cards.get(override, override) for override in HydraConfig.get().overrides.task)]
        # Hydra would log a traceback for an exception and turn it into its own exit; SystemExit passes through with its text.
        try:
            _check_nothing_missing(config)
            run(config)
        except CommandError as error:
            raise SystemExit(f"error: {error}") from None
        except KeyboardInterrupt:
            print("\nStopped.", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None

    hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name=config_name)(body)()


def prepare_arguments(argv: Sequence[str], config_name: str) -> list[str]:
    """Check every override of a command line, and return the line as Hydra takes it.

    Args:
        argv: Arguments after the program's name.
        config_name: The primary config, ``"train"`` for example.

    Returns:
        The same arguments; a key that the constructor has but the YAML does not list gets Hydra's ``++``.

    Raises:
        CommandError: Unknown key, group or choice (naming the nearest), wrong type, value outside the allowed ones, malformed override.
    """
    args, unknown = get_args_parser().parse_known_args(list(argv))
    if unknown:
        raise CommandError(f"Unknown option {unknown[0]!r}. Settings are written key=value, for example loss=svls; --help lists the options.")
    if args.help or args.hydra_help or args.info or args.shell_completion:
        return list(argv)
    overrides = _with_own_cards(args.overrides)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(configs_dir())):
        extra = [f"hydra.searchpath=[file://{Path(args.config_dir).absolute()}]"] if args.config_dir else []
        try:
            additions = _check_overrides(overrides, extra, args.config_name or config_name, sweep=args.multirun)
        finally:
            GlobalHydra.instance().clear()
    rewritten: dict[str, str] = dict(zip(args.overrides, overrides, strict=True))
    return [additions.get(rewritten.get(arg, arg), rewritten.get(arg, arg)) for arg in argv]


def composed(argv: Sequence[str], config_name: str) -> DictConfig:
    """The checked config of a command line whose command is another program's.

    Args:
        argv: Settings, ``key=value``, and maybe ``--config-dir DIR``.
        config_name: The primary config.

    Raises:
        CommandError: As :func:`prepare_arguments`; where a setting is missing; or where there are other options.
    """
    register_settings()
    args = get_args_parser().parse_args(prepare_arguments(argv, config_name))
    if other := [arg for arg in argv if arg.startswith("-") and not arg.startswith(("--config-dir", "-cd"))]:
        raise CommandError(f"{other[0]}: expected settings, key=value, and no option but --config-dir.")
    extra = [f"hydra.searchpath=[file://{Path(args.config_dir).absolute()}]"] if args.config_dir else []
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(configs_dir())):
        config = _compose(config_name, args.overrides + extra)
    _check_nothing_missing(config)
    return config


def _with_own_cards(overrides: Sequence[str]) -> list[str]:
    """Make a card of the user's own, given by its path, a choice of the group ``data``, as those that densecal brings are."""
    from densecal.data.card import load_card

    store = ConfigStore.instance()
    result: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "data" and value.endswith((".yaml", ".yml")):
            try:
                card = load_card(value)
            except (ValueError, OSError) as error:
                raise CommandError(str(error)) from None
            store.store(group="data", name=Path(value).stem, node=OmegaConf.structured(card))
            _CARD_PATHS.append(value)
            override = f"data={Path(value).stem}"
        result.append(override)
    return result


def _check_nothing_missing(config: DictConfig) -> None:
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise CommandError(
            f"Missing: {', '.join(missing)}. Give {'it' if len(missing) == 1 else 'each'} as {missing[0]}=...; --help explains the settings."
        )


def _check_overrides(overrides: list[str], extra: list[str], config_name: str, *, sweep: bool) -> dict[str, str]:
    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException:
            raise CommandError(f"Cannot read {text!r}. Settings are written key=value; quote values with spaces or brackets: 'key=[1,2]'.") from None

    ours = [o for o in parsed if not o.key_or_group.startswith("hydra.")]
    options = {o.key_or_group: loader.get_group_options(o.key_or_group, config_name=config_name, overrides=extra) for o in ours}
    groups = [o for o in ours if options[o.key_or_group]]
    for override in groups:
        if override.is_delete():
            continue
        names = options[override.key_or_group]
        for choice in _values(override):
            for name in choice if isinstance(choice, list) else [choice]:
                if name is None:
                    raise CommandError(
                        f"{override.input_line}: a choice is one of {', '.join(names)}. Leave it out, or write '~{override.key_or_group}'."
                    )
                unlisted = MODELS if override.key_or_group == "model" else None
                if str(name) not in names and (unlisted is None or str(name) not in unlisted):
                    more = unlisted.family_names() if unlisted else ()
                    raise CommandError(f"No {override.key_or_group} {str(name)!r}. {near_matches(str(name), names, more=more)}")

    additions: dict[str, str] = {}
    for combination in _combinations(ours, sweep=sweep):
        lines = dict(zip([id(o) for o in ours], combination, strict=True))
        chosen = [lines[id(o)] for o in groups]
        base = _compose(config_name, chosen + extra)
        settings = []
        for override in ours:
            if override in groups:
                continue
            line, key = lines[id(override)], override.key_or_group
            added = override.is_add() or override.is_force_add()
            filled = not added and _fills(base, key, override)
            if not _has(base, key) and not (override.is_delete() and _constructor_takes(base, key)):
                if not _constructor_takes(base, key) and not (added and _may_grow(base, key.rpartition(".")[0])):
                    raise CommandError(f"Unknown setting {key!r}. {_nearest_key(base, key)}")
                filled = not added
            if filled:
                additions[override.input_line or line] = f"++{override.input_line or line}"
                line = f"++{line}"
            settings.append(line)
        _check_constructors(_compose(config_name, chosen + settings + extra))
    return additions


def _values(override: Override) -> list[Any]:
    value = override.value()
    return list(override.sweep_iterator()) if override.is_sweep_override() else [value]


def _combinations(overrides: list[Override], *, sweep: bool) -> Iterator[tuple[str, ...]]:
    """The override lines of each job."""
    lines = []
    for override in overrides:
        if override.is_sweep_override():
            if not sweep:
                raise CommandError(
                    f"{override.input_line!r} has several values. Add -m to run one job for each, or quote it: '{override.key_or_group}=[...]'."
                )
            key = override.get_key_element()
            lines.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            lines.append([override.input_line or ""])
    yield from itertools.product(*lines)


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    try:
        return hydra.compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        text = str(error.__cause__ or error).strip().splitlines()
        key = next((line.partition(":")[2].strip() for line in text if line.strip().startswith("full_key:")), "")
        raise CommandError(f"{key + ': ' if key else ''}{text[0]}") from None


def _has(config: DictConfig, key: str) -> bool:
    node: Any = config
    for part in key.split("."):
        if isinstance(node, DictConfig) and (part in node or OmegaConf.is_missing(node, part)):  # ??? does not count as being in it
            node = node._get_node(part)
        elif isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node._get_node(int(part))
        else:
            return False
    return True


def _constructor_takes(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else None
    return isinstance(node, DictConfig) and "_target_" in node and name in parameters(_locate(node["_target_"], parent))


def _fills(config: DictConfig, key: str, override: Override) -> bool:
    """Whether a mapping is given for one whose names are the user's, and that is empty so far, such as ``data.regions``."""
    node = OmegaConf.select(config, key) if _has(config, key) else None
    empty = isinstance(node, DictConfig) and not node and not is_dataclass(OmegaConf.get_type(node))
    return empty and not override.is_delete() and isinstance(override.value(), dict)


def _may_grow(config: DictConfig, parent: str) -> bool:
    """Whether ``+`` may add a key below ``parent``: not at the top nor to a data set card, whose keys are fixed."""
    node = OmegaConf.select(config, parent) if parent else None
    return bool(parent) and _has(config, parent.partition(".")[0]) and not (isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)))


def _nearest_key(config: DictConfig, key: str) -> str:
    """The likeliest keys, near in name beside the one given or of the same name elsewhere, and the list to choose from."""
    keys = list(_keys(config))
    parent, _, last = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == parent}
    near = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1, cutoff=0.75)]
    near = near or [k for k in keys if k.rpartition(".")[2] == last] or difflib.get_close_matches(key, keys, n=2)
    elsewhere = {k.rpartition(".")[2]: k for k in keys}
    near = near or [elsewhere[name] for name in difflib.get_close_matches(last, elsewhere, n=2)]
    hint = f"Did you mean {' or '.join(repr(k) for k in near[:3])}? " if near else ""
    where = f"Settings of {parent!r}" if parent and siblings else "Settings"
    names = sorted(siblings or (str(k) for k in config))
    return f"{hint}{where}: {', '.join(names)}." if not hint or len(names) <= _MOST_NAMES else hint.strip()


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(config, DictConfig) or config._is_none():
        return
    for name in map(str, config):
        if name in ("_target_", "_partial_", "hydra"):
            continue
        yield f"{prefix}{name}"
        if not OmegaConf.is_missing(config, name):
            yield from _keys(config._get_node(name), f"{prefix}{name}.")
    if "_target_" in config:
        required_later = 1 if config.get("_partial_") else 0  # what a partial is called with: an optimizer's params, a schedule's optimizer
        yield from (f"{prefix}{name}" for name in parameters(_locate(config["_target_"], prefix))[required_later:] if name not in config)


def _check_constructors(config: DictConfig) -> None:
    """Hold the arguments of every ``_target_`` against its signature and type hints."""
    for path, node in _targets(OmegaConf.to_container(config, resolve=False), ""):
        target = _locate(node["_target_"], path)
        names: list[str] | None = parameters(target)
        hints = _hints(target)
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(target).parameters.values()):
            names = None
        for name, value in node.items():
            if name.startswith("_"):
                continue
            if names is not None and name not in names:
                raise CommandError(f"{path}.{name}: {node['_target_']} has no such argument. {near_matches(name, names)}")
            if name in hints and not _fits(value, hints[name]):
                raise CommandError(f"{path}.{name}: expected {_spell(hints[name])}, but got {value!r}.")


def _targets(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, Mapping) and "_target_" in node:
        yield path, node
    for name, child in children:
        yield from _targets(child, f"{path}.{name}" if path else str(name))


def _locate(target: str, path: str) -> Callable[..., Any]:
    try:
        found: Callable[..., Any] = hydra.utils.get_object(target)
    except Exception as error:
        raise CommandError(f"{path.rstrip('.')}._target_: cannot import {target!r} ({str(error).splitlines()[0]}).") from None
    if not callable(found):
        raise CommandError(f"{path.rstrip('.')}._target_: expected a class or function, but {target!r} is a {type(found).__name__}.")
    return found


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:
        return {}  # a third party's annotation that cannot be resolved; its constructor still checks


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    if isinstance(value, str) and "${" in value:
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in args)
    if isinstance(value, list) and origin in (list, Sequence) and args:
        return all(_fits(item, args[0]) for item in value)  # beartype looks at one item, drawn by chance
    try:
        return any(is_bearable(candidate, hint, conf=_INT_IS_FLOAT) for candidate in ([value, tuple(value)] if isinstance(value, list) else [value]))
    except Exception:
        return True  # a hint that cannot be checked at run time


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {typing.get_args(hint)}"
    return inspect.formatannotation(hint).replace("collections.abc.", "").replace("typing.", "")


def build(node: DictConfig, name: str, **known: Any) -> Any:
    """:func:`densecal.instantiation.instantiate` a ``_target_`` node; its refusal becomes one line that names the setting."""
    try:
        return instantiate(node, **known)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise CommandError(f"{name}: {str(cause).splitlines()[0]}") from cause


def build_loss(node: DictConfig, name: str, schema: LabelSchema, **known: Any) -> Any:
    """:func:`build` a loss, or a part of one, for classes or regions: it is handed their number, the ignored label and the activation, which settings need not say,
    and must not say otherwise."""
    of_data = {"activation": schema.activation, "ignore_index": schema.ignore_index, "num_classes": schema.num_classes}
    for key, said in _said(node, name, of_data):
        expected = of_data[key.rpartition(".")[2]]
        if said != expected:
            raise CommandError(f"{key}: expected {expected}, which is what the data set says, but got {said}. Leave it out.")
    return build(node, name, **of_data, **known)


def _said(node: Any, path: str, names: Container[str]) -> Iterator[tuple[str, Any]]:
    """Key and value of every setting in a node and the nodes inside it that has one of some names."""
    for name, value in ((str(key), value) for key, value in node.items()) if isinstance(node, DictConfig) else ():
        if name in names and value is not None:
            yield f"{path}.{name}", value
        yield from _said(value, f"{path}.{name}", names)


def given_settings() -> tuple[dict[str, str], list[str]]:
    """What this job's command line sets: the groups it chooses from (``{"loss": "svls"}``), and the keys of its other settings."""
    made = HydraConfig.get().runtime.choices
    keys = [override.lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task]
    return {key: str(made[key]) for key in keys if key in made}, [key for key in keys if key not in made]
