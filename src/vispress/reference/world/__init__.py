"""The drawn world: scenes, clips and episodes, and questions about them."""
