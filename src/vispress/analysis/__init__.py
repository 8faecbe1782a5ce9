"""Pictures of which visual tokens a method kept."""
