"""How the embedded pipeline in assets/tiny was made; not needed to use it."""
