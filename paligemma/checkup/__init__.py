"""The checks of `paligemma doctor`: the machine, its arithmetic and speed, the files of a model, and the hub."""
