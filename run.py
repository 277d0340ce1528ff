"""The command line: `python run.py experiment=ssl_nas_mmimdb`; `--help` lists the experiments."""

from mmnas_lab.cli import main

if __name__ == "__main__":
    main()
