"""`alula bench cuda`: cases, models and clocks. All of it also runs on a CPU, at small sizes, to be tested there."""
