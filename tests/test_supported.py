"""Which methods a model takes: as `compress_model` does, and why not."""

import pytest

import vispress
from tests.laws.table import FAMILIES, model_of
from vispress import compress_model, list_methods, remove_compression, unsupported_methods
from vispress.errors import ConfigError, VispressError
from vispress.method_options import make_budgeted
from vispress.methods import DivPrune


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_listed_compresses_and_what_is_not_says_why(family):
    model = model_of(family)
    refused = unsupported_methods(model)
    works = list_methods(model)
    assert sorted([*refused, *works]) == list_methods()
    for name in works:
        remove_compression(compress_model(model, make_budgeted(name, {}, 0.5)))
    for name, why in refused.items():
        with pytest.raises(VispressError) as caught:
            compress_model(model, make_budgeted(name, {}, 0.5))
        assert str(caught.value).startswith(why)
        assert "Methods that work" not in why


def test_a_compressed_model_is_asked_as_it_is():
    model = model_of(FAMILIES[0])
    before = unsupported_methods(model)
    compress_model(model, "random", keep_ratio=0.5)
    try:
        assert unsupported_methods(model) == before
    finally:
        remove_compression(model)


def test_a_class_in_place_of_a_compressor_is_told_how_to_be_one():
    model = model_of(FAMILIES[0])
    for given in (DivPrune, [DivPrune]):
        with pytest.raises(ConfigError, match=r"write DivPrune\(keep_ratio=0.25\)"):
            compress_model(model, given)


def test_dir_lists_what_is_not_imported_yet():
    assert set(vispress.__all__) <= set(dir(vispress))
