"""Tests and benchmarks; a package, so that no other package of that name hides it."""
