"""The ground floor: config, run folder, events, stop flag, distributed helpers."""
