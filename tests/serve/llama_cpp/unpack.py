"""`unpack.py IN.gguf OUT.gguf`: the same model with float32 weights, for which llama.cpp does not round activations."""

import sys

from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

OWN = ("general.architecture", "general.file_type", "general.quantization_version")

read = GGUFReader(sys.argv[1])
made = GGUFWriter(sys.argv[2], read.get_field("general.architecture").contents())
for one in read.fields.values():
    if not one.name.startswith("GGUF.") and one.name not in OWN:
        inner = one.types[-1] if one.types[0] == GGUFValueType.ARRAY else None
        made.add_key_value(one.name, one.contents(), one.types[0], sub_type=inner)
made.add_file_type(0)
for tensor in read.tensors:
    made.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
made.write_header_to_file()
made.write_kv_data_to_file()
made.write_tensors_to_file()
made.close()
