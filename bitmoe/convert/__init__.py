"""Conversion of trained models to and from the formats people run."""
