"""What is computed: stages, their networks and their diffusion; and how a config becomes a stage."""
