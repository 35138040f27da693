"""What is to be run, the plan, the workflow, tables beside the published ones, verification, the report."""
