"""Fast forms of fake quantization, one module for each kind of device; `compress.fakequant` has the form that they equal."""
