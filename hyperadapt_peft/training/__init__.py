"""Train from a recipe: `recipe` reads and checks it, `data` loads, `tasks` prepares, `train` runs it."""
