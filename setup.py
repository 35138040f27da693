"""Packaging of newsrepro: everything that varies stands in settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path
from shutil import copy2

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']


class BuildWithNotebooks(build_py):
    "A wheel has no clone around it, so it carries the notebooks that `newsrepro reproduce` runs and the tables it verifies against."
    def run(self):
        super().run()
        package, reference = Path(self.build_lib)/cfg['lib_name'], root/'reports'/'reference'
        carried = {'notebooks': sorted((root/cfg['nbs_path']/'methods').glob('[0-9]*.ipynb')), 'reference': [reference/'manifest.json'],
                   'reference/tables': sorted((reference/'tables').glob('*.csv'))}
        for folder, files in carried.items():
            (package/folder).mkdir(parents=True, exist_ok=True)
            for file in files: copy2(file, package/folder)


extras = {extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'docs', 'features', 'cluster')}

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    keywords=cfg['keywords'],
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'License :: OSI Approved :: Apache Software License', 'Programming Language :: Python :: 3'],
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={cfg['lib_name']: ['Snakefile'], cfg['lib_name'] + '.study': ['published.csv', '*.json', 'templates/*'],
                  cfg['lib_name'] + '.mini': ['world.json', 'collections.md', 'checkpoints/*', 'checkpoints/*/*']},
    install_requires=cfg['requirements'].split(),
    extras_require=extras | {'dev': extras['dev'] + extras['docs']},  # the tests build the documentation, too
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    cmdclass={'build_py': BuildWithNotebooks},
)
