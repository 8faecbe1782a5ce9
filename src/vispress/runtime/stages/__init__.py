"""Act at the stages of a model: one file a stage, under the protocol of `stages.base`."""
