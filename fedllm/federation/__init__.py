"""The federation that a recipe describes: clients, rows, plan and worker."""
