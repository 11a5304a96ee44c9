"""Steps in C for factors in main memory: a pair is read once, while the core's cache holds it.

Written for what PyTorch's batched products cannot do: stacking by shape reads and writes every
factor several times, which at low rank is most of a step. Two files of C and a header, compiled
with the machine's own C compiler when first needed and kept in the cache folder. Without a
compiler, with ``LORAPRO_NATIVE=0``, on other devices and for other dtypes the same steps run in
PyTorch.
"""
