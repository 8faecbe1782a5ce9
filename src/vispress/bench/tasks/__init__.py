"""Questions with known answers: tasks by name, tasks over datasets, metrics of answers."""
