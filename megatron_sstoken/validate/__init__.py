"""What is checked before a run: settings, layout, model, data; and the run plan that passes."""
