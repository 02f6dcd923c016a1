from srd_lab.cli.main import main

main()
