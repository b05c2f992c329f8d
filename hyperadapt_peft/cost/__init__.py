"""What training with a method costs: measured beside others (`hyperadapt bench`), or planned (`hyperadapt plan`)."""
