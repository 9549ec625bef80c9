"""Backends: compilers and run times behind one interface (`passdeploy.engines.base`)."""
