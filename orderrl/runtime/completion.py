"""Shell completion of the command `orderrl`: sub-commands, groups with their choices, and keys.

The script holds all words, so that a TAB starts no Python; it is for bash, and for zsh with `bashcompinit`.
"""

from collections.abc import Sequence

from orderrl.runtime.config import help_of, nodes_of, parts_of
from orderrl.runtime.schema import Part, settings_of

_SCRIPT = """\
# made by `orderrl --completion`; make it again after an update
_orderrl() {
    local line="${COMP_LINE:0:$COMP_POINT}" words
    local current="${line##*[ ]}"
    case "$line" in
@cases@
    *) words="@commands@ --help --version" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    # readline takes what stands before a "=" for a word of its own
    [[ $current == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${current%=*}="}")
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
    return 0
}
if [[ -n ${ZSH_VERSION-} ]]; then  # which has no compopt, and would put a space behind "key="
    complete -o default -o nospace -F _orderrl orderrl
else
    complete -o default -F _orderrl orderrl
fi
"""


def completion_script(commands: Sequence[str]) -> str:
    """A script for the shell; commands without a configuration complete files."""
    known = nodes_of()
    words = {name: _words(name) if name in known else ["--help"] for name in commands}
    cases = [f'    "orderrl {name} "*) words="{" ".join(found)}" ;;' for name, found in words.items()]
    return _SCRIPT.replace("@cases@", "\n".join(cases)).replace("@commands@", " ".join(commands))


def _words(command: str) -> list[str]:
    """`group=choice` and `key=` of a command; of a group the keys of every choice."""
    groups = help_of(command).groups
    choices = [f"{group}={choice}" for group, found in groups.items() for choice in found]
    known = nodes_of()
    parts = parts_of(command)
    for group, found in groups.items():
        source, _, place = group.partition("@")
        parts += [Part(place or source, known[f"{source}/{name}"]) for name in found if f"{source}/{name}" in known]
    return [*choices, *(f"{key}=" for key in settings_of(parts) if not key.endswith(".name")), "--help", "--multirun"]
