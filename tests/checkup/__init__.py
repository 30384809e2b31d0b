"""Tests of paligemma/checkup: a fault for each check of `paligemma doctor`."""
