"""Tools without knowledge of models: files, the kernels' cache."""
