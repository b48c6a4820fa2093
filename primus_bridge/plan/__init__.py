"""What a run would do, from config.json alone: layout, parameters, memory, schedule, steps; torch is not imported."""
