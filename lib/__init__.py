"""What the scripts share: imported, never run. The rooms data, run and model import only the files beside this one."""
