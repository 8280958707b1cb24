"""One file per console command, each with ``run(args)``; imported when the command is called."""
