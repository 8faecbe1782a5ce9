"""The two reference architectures: building, loading, processing and packed forwards."""
