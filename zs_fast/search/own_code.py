"""A person's own functions, named in their recipe as `package.module:function`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from zs_fast.errors import PreflightError


@functools.cache
def load_function(name: str, *, setting: str) -> Callable[..., Any]:
    """The function `package.module:function`, imported as Python would. `setting` is the key that names it.

    Only the recipe of a run may name one, never data, a model or a checkpoint: importing a module runs its code. Raises
    PreflightError where there is no such module or function; an error inside the module is the module's own.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there and imports another that isn't
        raise PreflightError(
            f"{setting} is {name!r}, but Python finds no module {error.name!r}. Install the package that holds it, or "
            "put its folder on the path: PYTHONPATH=FOLDER zs-fast train ..."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise PreflightError(f"{setting} is {name!r}, but {module_name} has no function {function_name!r}.")
    return function  # type: ignore[no-any-return]  # callable() is all that can be known
