"""Names of the modules and parameters of a model with PEFT's adapters."""


def parameter_name(module_name: str) -> str:
    """Return the name that a module or parameter of an adapted model has in the plain model."""
    return module_name.removeprefix("base_model.model.").replace(".base_layer", "")


def is_factor(parameter_name: str) -> bool:
    """Return whether a parameter of an adapted model is part of an adapter."""
    return ".lora_" in parameter_name


def is_wrapped(module_name: str) -> bool:
    """Return whether a module of an adapted model belongs to a layer that PEFT has wrapped with an adapter."""
    return ".base_layer" in module_name
