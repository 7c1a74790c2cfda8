"""What the scripts share: imported, never run. The rooms data, run and model know only the files beside this one."""
