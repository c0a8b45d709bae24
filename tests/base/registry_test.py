import pytest

from distill.base.errors import UserError
from distill.base.registry import Registry


def make_registry() -> Registry:
    return Registry("soup.herb", "soup.register_herb", {"basil": "soup.basil", "json": "json"})


def register(registry: Registry, name: str, module: str = "mine"):
    def herb():
        return module

    herb.__module__ = module
    return registry.register(name)(herb)


def test_unknown_names_list_the_known_and_how_to_add_one():
    registry = make_registry()
    register(registry, "thyme")
    with pytest.raises(UserError) as error:
        registry.get("tyme")
    assert str(error.value) == (
        "soup.herb names 'tyme', but the known names are basil, json, thyme; a module that "
        "plugins names can register one with soup.register_herb"
    )


def test_built_in_modules_are_imported_on_first_use():
    registry = make_registry()
    with pytest.raises(ModuleNotFoundError, match="soup"):
        registry.get("basil")
    herb = register(registry, "basil", module="soup.basil")
    assert registry.get("basil") is herb


def test_a_taken_name_says_by_whom():
    registry = make_registry()
    register(registry, "thyme")
    with pytest.raises(UserError, match="'thyme' for soup.herb is already taken by mine.register"):
        register(registry, "thyme", module="yours")
    with pytest.raises(UserError, match="'basil' for soup.herb is already taken by soup.basil"):
        register(registry, "basil")


def test_a_notebook_cell_may_run_twice():
    registry = make_registry()
    register(registry, "thyme")
    again = register(registry, "thyme")
    assert registry.get("thyme") is again


def test_entries_may_be_chosen_among():
    registry = make_registry()
    registry.register("thyme", lambda part: "fresh")(register)
    assert registry.get("thyme", lambda entry: entry == "fresh") == "fresh"
    with pytest.raises(UserError, match="no name is registered"):
        registry.get("thyme", lambda entry: entry == "dried")
