"""What torch.hub offers: torch.hub.load(CLONE, "convnextv2_tiny", source="local", checkpoint="checkpoint-best.pth").

The convnextv2_* entries give classifiers, or encoders where the file has no head; the fcmae_* entries masked
autoencoders. Each takes `checkpoint`, weights of any layout, and `model_key`, where in it they are, such as
"model_ema" (not needed for checkpoint-best-ema.pth). What the file tells (channels, stem stride, classes, the
decoder's size) need not be given; further arguments are those of `ConvNeXtV2` and `FCMAE`, and come before the file's.
"""

import importlib
import importlib.util
import logging
import os
import sys
import zlib


def _own(package: str) -> str:
    """The name by which this clone's package is imported, whatever the program's own `models` and `utils` are."""
    folder = os.path.join(os.path.dirname(os.path.realpath(__file__)), package)
    if folder in map(os.path.realpath, getattr(sys.modules.get(package), "__path__", ())):
        return package
    name = f"fcmae_{package}_{zlib.crc32(folder.encode()):x}"  # of this clone alone, and the same in every process
    if name not in sys.modules:
        init = f"{folder}/__init__.py"
        spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[folder])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return name


convnextv2, fcmae = (importlib.import_module(f"{_own('models')}.{name}") for name in ("convnextv2", "fcmae"))
weights = importlib.import_module(f"{_own('utils')}.weights")

dependencies = ["torch", "torchvision", "timm", "safetensors"]


def _entry(name: str, factory):
    def told(config: weights.BackboneConfig) -> dict:
        if name.startswith("fcmae"):
            return {"patch_size": convnextv2.total_stride(config.stem_stride), **config.decoder}
        return {"stem_stride": config.stem_stride, "num_classes": config.num_classes}

    def build(checkpoint=None, model_key: str = weights.MODEL_KEY, **kwargs):
        if checkpoint is None:
            return factory(**kwargs)
        try:
            model, report, *_ = weights.load_checkpoint(
                checkpoint, lambda c: factory(**{"in_chans": c.in_chans, **told(c), **kwargs}), model_key=model_key
            )
        except weights.UsageError as error:
            raise ValueError(f"{name} from {error}") from error
        if report.missing_keys:
            fresh = report.rows()["fresh"]
            logging.getLogger("fcmae").warning("%s has nothing that fits for %s: fresh", checkpoint, fresh)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{factory.__doc__} checkpoint: its weights, in any layout; model_key: where in the file."
    return build


for _size in convnextv2.SIZES:  # torch.hub looks names up in this module
    for _name, _module in ((_size, convnextv2), (_size.replace("convnextv2", "fcmae"), fcmae)):
        globals()[_name] = _entry(_name, getattr(_module, _size))
