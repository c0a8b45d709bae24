"""Completion of config keys and their choices with the Tab key, for bash.

    eval "$(python -m distill.config.completion)"

then completes `python -m distill.main --config.pol<Tab>`; other commands of python go on completing
file names.
"""

from __future__ import annotations

from distill.config.words import all_keys

# Bash cuts words at "=", so that a value is a word of its own behind one that is "=".
_SCRIPT = """\
_distill() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} key choices=
  COMPREPLY=()
  [[ " ${COMP_WORDS[*]} " == *" distill."* ]] || return 0
  if [[ $word == --config.* ]]; then
    COMPREPLY=($(compgen -S = -W '%(keys)s' -- "$word"))
    compopt -o nospace 2>/dev/null
    return 0
  fi
  if [[ $word == = ]]; then key=$before word=; fi
  if [[ $before == = ]]; then key=${COMP_WORDS[COMP_CWORD-2]}; fi
  case $key in
%(choices)s
  esac
  COMPREPLY=($(compgen -W "$choices" -- "$word"))
}
complete -o default -F _distill python python3
"""


def bash_script() -> str:
    """Defines the function `_distill` and binds it to python."""
    keys = list(all_keys())
    choices = {
        key.name: "True, False" if key.kind == "bool" else key.allowed
        for key in keys
        if key.kind in ("bool", "str") and (key.allowed or key.kind == "bool")
    }
    return _SCRIPT % {
        "keys": " ".join(f"--config.{key.name}" for key in keys),
        "choices": "\n".join(
            f'    --config.{name}) choices="{allowed.replace(",", "")}" ;;'
            for name, allowed in choices.items()
        ),
    }


if __name__ == "__main__":
    print(bash_script(), end="")
