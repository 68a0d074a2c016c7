from sparseinst.cli import main

main()
