"""From configuration to model: translation to megatron-core, specs, initial values, counts, plans."""
