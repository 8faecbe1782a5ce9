"""Running a plan: each cell applied to the model, checked against its budget, stored."""
