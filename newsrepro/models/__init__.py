"""Encoders, ViLT and heat maps, and how they are trained."""
