"""The tiny world: named drawings that the embedded tiny FLUX and its pool are trained on."""
