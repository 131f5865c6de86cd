"""Our ops in the place of other trainers' own: one module a trainer, imported by its name; each needs its trainer installed."""
