"""Drawing: schedulers, sampler, residency of adapters, and the engine."""
