"""The fused lens in Triton and in plain torch; imports nothing of refinelens.

The folder stands at the top of the repository and is the package `refinelens.kernels` by a symbolic link, so that it
cannot be taken for the package `kernels` that Transformers looks for.
"""
