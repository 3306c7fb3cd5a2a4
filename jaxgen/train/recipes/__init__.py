"""Whole jobs made of the library's parts; the command line runs them."""
